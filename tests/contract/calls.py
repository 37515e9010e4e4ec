"""How many functions are called: what makes the seconds of a hook, without a clock."""

import sys


def calls_in(function, *args, **kwargs):
    """Calls a function; how many Python and C functions were called, itself and the end of the counting among them."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(before)
    return count
