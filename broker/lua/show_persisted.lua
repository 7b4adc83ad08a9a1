-- Returns the public fields of persisted jobs, live or ended.
-- ARGV: prefix, then job ids.
-- Reply: per job {} if it is unknown, not persisted, or nothing is kept of it; else its id, the queue's time, and fields of
--       its record in the order of broker/operations/persisted_jobs.py. A reply that grows large ends early.
-- Invariant: 9 isolation (the caller compares the tenant).
-- uses: clock

local MAX_BYTES = 1024 * 1024 -- of job metadata
local answers, bytes = {}, 0
for i = 2, #ARGV do
  if bytes >= MAX_BYTES then break end
  local found = call('HMGET', P .. 'job:' .. ARGV[i], 'tenant', 'state', 'epoch', 'attempts', 'pool', 'lane', 'at',
    'started', 'ended_at', 'deadline', 'expires_at', 'cause', 'listed', 'topic', 'persisted_bytes', 'persisted',
    'output_epoch', 'output_replaced', 'job_metadata')
  local shown = found[1] and found[16] == '1' and { ARGV[i], int(now_ms()) } or {}
  for k = 1, shown[1] and 19 or 0 do shown[k + 2] = found[k] or '' end
  answers[#answers + 1] = shown
  bytes = bytes + string.len(found[19] or '')
end
return answers
