"""Everything private or unofficial of other libraries that this package touches, and what hides it from the other rooms.

`used.USED` names each of torch, transformers and accelerate, with the versions that it was checked on; a test looks whether all of
them are still there. FSDP and DeepSpeed are looked at when they are met, and other versions of them refused. What takes the place
of something that is missing is said at each function.
"""
