"""Everything private or unofficial of other libraries that this package touches, and nothing of its own.

`used.USED` names each, with the versions that it was checked on; a test looks whether all of them are still there. What takes
its place where it is missing is said at each function.
"""
