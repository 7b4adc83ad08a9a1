-- Says where a lost stream goes on: it waits again, ahead of new work.
-- ARGV: prefix, job id, epoch, envelope of the next attempt.
-- Reply: 'queued', also to a repeated call; the job's state if it is another one, or lost under a later epoch; 'unknown'.
-- Invariants: 1 no lost job, 3 fence, 7 streams, 12 conservation.
-- uses: clock, parking, queue

local job, epoch, envelope = load_job(ARGV[2]), ARGV[3], ARGV[4]
if not job then return 'unknown' end
if job.state ~= 'lost' or job.epoch ~= epoch then return job.state end
local size = string.len(envelope)
spend(job.pool, job.tenant, 0, size - tonumber(job.size))
job.size = int(size)
call('ZREM', P .. 'lost', job.id)
requeue(job, 'env', envelope)
wake(queue_key(job), now_ms())
return write_counters_and_return('queued')
