-- Cancels a job whatever its state.
-- ARGV: prefix, job id, reason, condition (0: none; 1: a Router met a job that nobody waits for there, persisted ones are
--       spared; 2: only if it is queued), abandoned_ms (above 0: only if no Router has listened to it for so long),
--       used (what the answer has cost at least, as far as it was delivered: its tenant is charged no less; 0: unknown).
-- Reply: the state it was in: 'queued' or 'lost' (removed unrun), 'leased' (its worker is told to abort), a terminal state
--       (nothing changed), or 'unknown' (a tombstone stands now, so that a late enqueue is void, unless a condition was given).
-- Invariants: 10 deadline and cancel, 12 conservation.
-- uses: endings

local id, reason, condition, abandoned_ms = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local used = tonumber(ARGV[6] or 0)
local job = load_job(id)
if not job then
  if condition == '0' and abandoned_ms == 0 then leave_tombstone(id, 'cancelled', '0', '') end
  return 'unknown'
end
local before = job.state
if not TRANSITIONS[before .. ' cancelled'] or condition == '1' and job.persisted == '1' then return before end
if condition == '2' and before ~= 'queued' then return before end
if abandoned_ms > 0 then
  if now_ms() - tonumber(call('HGET', P .. 'job:' .. id, 'detached_at') or 0) < abandoned_ms then return before end
  for _, router in ipairs(listeners_of(job)) do
    if call('EXISTS', P .. 'reply:' .. router) == 1 then return before end
  end
end
if before == 'leased' and used > tonumber(job.cost) then correct(job, used) end
cancel_or_expire(job, 'cancelled', reason)
return write_counters_and_return(before)
