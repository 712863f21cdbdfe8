"""A training that stops as if it were killed, to be gone on with."""

from typing import Any

from openbook import training


def killing_after(updates: int) -> Any:
    """What takes the place of `training.save_checkpoint`: it stops behind the checkpoint of so many updates."""
    save = training.save_checkpoint

    def stop(learners: Any, scratch: Any, done: int, accelerator: Any) -> None:
        save(learners, scratch, done, accelerator)
        if done >= updates:
            raise KeyboardInterrupt

    return stop
