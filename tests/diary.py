"""Where a module of a test notes what happens to it."""


class Diary(list):
    """A list that stays as it is: what a module has in a plain list, or a number, is put back after a forward of ours.

    `undisturbed` does that, see `functional/attributes.py`; objects of other classes it leaves alone.
    """
