-- Forgets all that is kept of a persisted job, at once; one that lives is cancelled first.
-- ARGV: prefix, job id, reason.
-- Reply: the state it was in, 'unknown' if nothing is kept of it. A tombstone stands for a while, as after any end.
-- Invariants: 8 bounded memory, 10 deadline and cancel, 12 conservation.
-- uses: endings

local id, reason = ARGV[2], ARGV[3]
local job = load_job(id)
if not job or job.persisted ~= '1' then return 'unknown' end
local before = job.state
if TRANSITIONS[before .. ' cancelled'] then
  job.is_forgotten = true
  cancel_or_expire(job, 'cancelled', reason)
  return write_counters_and_return(before)
end
delete_persisted(job, unpack(call('HMGET', P .. 'job:' .. id, 'persisted_bytes', 'idem', 'listed')))
call('ZREM', P .. 'persisted', id)
leave_tombstone(id, before, job.epoch, job.aid)
return write_counters_and_return(before)
