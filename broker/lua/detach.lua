-- Ends a Router's listening to a persisted job, and notes when that was.
-- ARGV: prefix, job id, router.
-- Reply: 1.
-- Invariant: 8 bounded memory.
-- uses: clock, transitions

local id, key = ARGV[2], P .. 'job:' .. ARGV[2]
call('SREM', P .. 'listeners:' .. id, ARGV[3])
local state = call('HGET', key, 'state')
if state and not TERMINAL[state] then call('HSET', key, 'detached_at', int(now_ms())) end
return 1
