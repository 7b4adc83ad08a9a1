-- Cancels a job whatever its state.
-- ARGV: prefix, job id, reason, unasked (1: a Router met a job that nobody waits for there; stored ones are spared),
--       abandoned_ms (above 0: only if no Router has listened to it for so long).
-- Reply: the state it was in: 'queued' or 'lost' (removed unrun), 'leased' (its worker is told to abort), a terminal state
--       (nothing changed), or 'unknown' (a tombstone stands now, so that a late enqueue is void, unless it was unasked).
-- Invariants: 10 deadline and cancel, 12 conservation.

local id, reason, if_orphaned, abandoned_ms = ARGV[2], ARGV[3], ARGV[4] == '1', tonumber(ARGV[5])
local abandoned = abandoned_ms > 0
local job = load_job(id)
if (if_orphaned or abandoned) and not job then return 'unknown' end
if if_orphaned and job.stored == '1' then return job.state end
if abandoned then
  local left = tonumber(call('HGET', P .. 'job:' .. id, 'left') or 0)
  if now_ms() - left < abandoned_ms then return job.state end
  for _, router in ipairs(stored().listeners_of(job)) do
    if call('EXISTS', P .. 'reply:' .. router) == 1 then return job.state end
  end
end
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
