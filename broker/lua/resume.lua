-- A Router says where a lost stream goes on: it waits again, ahead of new work.
-- ARGV: prefix, job id, epoch, envelope of the next attempt.
-- Reply: 'queued', also to a repeated call; the job's state if it is another one, or lost under a later epoch; 'unknown'.
-- Invariants: 1 no lost job, 3 fence, 7 streams, 12 conservation.

local now = now_ms()
local job = load_job(ARGV[2])
if not job then return 'unknown' end
if job.state ~= 'lost' or job.epoch ~= ARGV[3] then return job.state end
local key, envelope = P .. 'job:' .. job.id, ARGV[4]
local grown = string.len(envelope) - tonumber(job.size)
call('ZREM', P .. 'lost', job.id)
job.size = int(string.len(envelope))
call('HSET', key, 'env', envelope, 'size', job.size, wait_again(job))
add('budget', 't:' .. job.tenant .. ':bytes', grown)
add('budget', 'p:' .. job.pool .. ':bytes', grown)
wake_one(place(job), now)
return answered('queued')
