-- Takes back what an session id holds: it is dead (its attempts are spent) or leaves (they are not).
-- ARGV: prefix, session id, counted (1 or 0), limit (jobs in this call), reason.
-- Reply: {requeued, dead, cancelled, left, lost}. Call again while ``left`` is above 0. From the first call on, the
--       session id is fenced: it can neither claim nor renew.
-- Invariants: 1 no lost job, 3 fence, 11 poison bound.

local now = now_ms()
local session_id, counted = ARGV[2], ARGV[3] == '1'
local leases = P .. 'leases:' .. session_id
local held = call('HKEYS', leases)
-- Once a reclaim is under way, its suspect may be among those that were taken back.
local suspect = call('HGET', P .. 'claimed:' .. session_id, 'suspect')
local suspects = suspect and (call('HGET', P .. 'beats', session_id) == '-1' or still_runs(suspect))
-- Nobody wakes it any more, least of all for what it held.
local claimed = P .. 'claimed:' .. session_id
for where in string.gmatch(call('HGET', claimed, 'parked') or '', '%S+') do
  call('ZREM', P .. 'parked:' .. where, session_id)
end
call('HDEL', claimed, 'parked')
if #held > 0 then
  call('HSET', P .. 'beats', session_id, '-1')
  if suspect and not suspects then call('HDEL', P .. 'claimed:' .. session_id, 'suspect') end
end
local counts = { requeued = 0, dead = 0, cancelled = 0, lost = 0 }
local handled = 0
for _, id in ipairs(held) do
  if handled >= tonumber(ARGV[4]) then break end
  handled = handled + 1
  local job = load_job(id)
  if job and job.state == 'leased' and job.owner == session_id then
    job.aid = '' -- should it die: what its worker says of it from now on is fenced, no repeat of its own word
    local fate = counted and give_up_crashed(job, suspects, 1, ARGV[5], now) or give_up(job, false, ARGV[5], now)
    counts[fate] = counts[fate] + 1
    if fate == 'requeued' then wake_one(place(job), now) end
  else
    drop_lease(session_id, id, call('HGET', leases, id))
  end
end
if handled == #held then
  call('HDEL', P .. 'beats', session_id)
  call('DEL', leases, claimed, P .. 'ctl:' .. session_id)
end
return answered({ counts.requeued, counts.dead, counts.cancelled, #held - handled, counts.lost })
