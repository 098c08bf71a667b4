"""The distributed engine under the strategy."""
