"""openbook: teach a small text model from the right textbook, then let it sit the exam with the book open."""
