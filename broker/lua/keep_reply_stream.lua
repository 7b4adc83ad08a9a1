-- Keeps a reply stream, or makes it if it is not there, and drops what was read.
-- ARGV: prefix, its reader, ttl_ms, id of the last entry read ('0': none, or nothing is to be dropped).
-- Reply: 1 if it had to be made, else 0.
-- Invariant: 8 bounded memory (the sweep removes the streams whose readers are gone).
-- uses: clock, streams

local reader, ttl_ms = ARGV[2], tonumber(ARGV[3])
call('ZADD', P .. 'readers', int(now_ms() + ttl_ms), reader)
return keep_stream(P .. 'reply:' .. reader, ARGV[4], ttl_ms) and 1 or 0
