"""The Lua scripts of the queue, and the linker that joins each with its libraries."""
