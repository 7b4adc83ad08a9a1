-- Ends a Router's listening to a persisted job, and notes when that was.
-- ARGV: prefix, job id, router.
-- Reply: 1.
-- Invariant: 8 bounded memory.
-- uses: clock, records, transitions

local id = ARGV[2]
call('SREM', P .. 'listeners:' .. id, ARGV[3])
local job = load_job(id)
if job and not TERMINAL[job.state] then call('HSET', P .. 'job:' .. id, 'detached_at', int(now_ms())) end
return 1
