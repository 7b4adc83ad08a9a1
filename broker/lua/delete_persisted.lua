-- Forgets all that is kept of a persisted job, at once; one that lives is cancelled first.
-- ARGV: prefix, job id, reason.
-- Reply: the state it was in, 'unknown' if nothing is kept of it. A tombstone stands for a while, as after any end.
-- Invariants: 8 bounded memory, 10 deadline and cancel, 12 conservation.
-- uses: endings

local id, reason = ARGV[2], ARGV[3]
local key = P .. 'job:' .. id
local job = load_job(id)
if not job or job.persisted ~= '1' then return 'unknown' end
local before = job.state
if TRANSITIONS[before .. ' cancelled'] then
  job.is_forgotten = true
  cancel_or_expire(job, 'cancelled', reason)
  return write_counters_and_return(before)
end
delete_persisted(id, unpack(call('HMGET', key, 'tenant', 'persisted_bytes', 'idem', 'listed', 'at')))
call('ZREM', P .. 'persisted', id)
call('DEL', key)
call('HSET', key, 'state', before, 'epoch', job.epoch, 'aid', job.aid)
call('PEXPIRE', key, TOMBSTONE_MS)
return write_counters_and_return(before)
