-- Forgets all that is kept of a stored job, at once; one that lives is cancelled first.
-- ARGV: prefix, job id, reason.
-- Reply: the state it was in, 'unknown' if nothing is kept of it. A tombstone stands for a while, as after any end.
-- Invariants: 8 bounded memory, 10 deadline and cancel, 12 conservation.

local id, reason = ARGV[2], ARGV[3]
local key = P .. 'job:' .. id
local job = load_job(id)
if not job or job.stored ~= '1' then return 'unknown' end
local before = job.state
if before == 'queued' or before == 'lost' then
  cancel_waiting(job, 'cancelled', reason)
elseif before == 'leased' then
  cancel_leased(job, 'cancelled', reason)
end
local found = call('HMGET', key, 'tenant', 'kept', 'idem', 'listed', 'at')
if found[1] then
  call('ZREM', P .. 'kept', id)
  stored().forget(id, unpack(found))
  call('DEL', key)
  local ended = TERMINAL[before]
  call('HSET', key, 'state', ended and before or 'cancelled', 'epoch', job.epoch, 'aid', ended and job.aid or '')
  call('PEXPIRE', key, TOMBSTONE_MS)
end
return answered(before)
