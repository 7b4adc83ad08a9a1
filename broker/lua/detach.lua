-- A Router listens to a stored job no more, and when that was is noted.
-- ARGV: prefix, job id, router.
-- Reply: 1.
-- Invariant: 8 bounded memory.

local id, key = ARGV[2], P .. 'job:' .. ARGV[2]
call('SREM', P .. 'listeners:' .. id, ARGV[3])
local state = call('HGET', key, 'state')
if state and not TERMINAL[state] then call('HSET', key, 'left', int(now_ms())) end
return 1
