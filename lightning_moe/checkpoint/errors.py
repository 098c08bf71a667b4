"""The one error that a checkpoint raises."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names it, what is wrong with it, and the remedy."""
