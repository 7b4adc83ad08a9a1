-- Returns the public fields of persisted jobs, live or ended.
-- ARGV: prefix, then job ids.
-- Reply: per job {} if it is unknown, not persisted, or nothing is kept of it; else its id, the queue's time, and fields of
--       its record in the order of broker/operations/persisted_jobs.py. A reply that grows large ends early.
-- Invariant: 9 isolation (the caller compares the tenant).
-- uses: clock, records

local MAX_BYTES = 1024 * 1024 -- of job metadata
local answers, bytes = {}, 0
for i = 2, #ARGV do
  if bytes >= MAX_BYTES then break end
  local job, shown = load_job(ARGV[i]), {}
  if job and job.persisted == '1' then
    shown = { job.id, int(now_ms()), job.tenant, job.state, job.epoch, job.attempts, job.pool, job.lane, job.at,
      job.deadline }
    local more = call('HMGET', P .. 'job:' .. job.id, 'started', 'ended_at', 'expires_at', 'cause', 'listed', 'topic',
      'persisted_bytes', 'output_epoch', 'output_replaced', 'job_metadata')
    for k = 1, 10 do shown[10 + k] = more[k] or '' end
    bytes = bytes + string.len(more[10] or '')
  end
  answers[#answers + 1] = shown
end
return answers
