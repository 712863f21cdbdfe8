"""Stories: one stage of a recipe each, readable from top to bottom."""
