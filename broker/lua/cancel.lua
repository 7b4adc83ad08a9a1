-- Cancels a job whatever its state.
-- ARGV: prefix, job id, reason.
-- Reply: the state it was in: 'queued' or 'lost' (removed unrun), 'leased' (its worker is told to abort), a terminal state
--       (nothing changed), or 'unknown' (a tombstone stands now, so that a late enqueue is void).
-- Invariants: 10 deadline and cancel, 12 conservation.

local id, reason = ARGV[2], ARGV[3]
local job = load_job(id)
if not job then
  local key = P .. 'job:' .. id
  call('HSET', key, 'state', 'cancelled', 'epoch', '0', 'aid', '')
  call('PEXPIRE', key, TOMBSTONE_MS)
  return 'unknown'
end
if job.state == 'queued' or job.state == 'lost' then
  cancel_waiting(job, 'cancelled', reason)
elseif job.state == 'leased' then
  cancel_leased(job, 'cancelled', reason)
end
return answered(job.state)
