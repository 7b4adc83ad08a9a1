-- Takes back what a worker session holds: it is dead (its attempts are spent) or leaves (they are not).
-- ARGV: prefix, session id, counted (1 or 0), limit (jobs in this call), reason.
-- Reply: {requeued, dead, cancelled, left, lost}. Call again while ``left`` is above 0. From the first call on, the session
--       is fenced: it can neither claim nor renew.
-- Invariants: 1 no lost job, 3 fence, 11 poison bound.
-- uses: attempts, fence

local now = now_ms()
local session_id, counted, limit, reason = ARGV[2], ARGV[3] == '1', tonumber(ARGV[4]), ARGV[5]
local leases, claimed = P .. 'leases:' .. session_id, P .. 'claimed:' .. session_id
local held = call('HKEYS', leases)
local last = call('HMGET', claimed, 'suspect', 'parked')
-- Once a reclaim is under way, its suspect may be among those that were taken back.
local is_under_way = call('HGET', P .. 'renewals', session_id) == '-1'
local any_suspect = last[1] and (is_under_way or still_runs(last[1]))
unpark(session_id, last[2]) -- nobody wakes it any more, least of all for what it held
if #held > 0 then
  call('HSET', P .. 'renewals', session_id, '-1')
  if last[1] and not any_suspect then call('HDEL', claimed, 'suspect') end
end
local counts = { requeued = 0, dead = 0, cancelled = 0, lost = 0 }
local handled = math.min(#held, limit)
for i = 1, handled do
  local id, job = held[i], load_job(held[i])
  if job and job.state == 'leased' and job.owner == session_id then
    job.aid = '' -- if it becomes a dead letter, late reports of its worker are fenced, not duplicates
    local outcome = counted and end_crashed(job, any_suspect, 1, reason, now) or retry_or_end(job, false, reason, now)
    counts[outcome] = counts[outcome] + 1
  else
    call('HDEL', leases, id) -- its record was evicted or deleted
  end
end
if handled == #held then
  call('HDEL', P .. 'renewals', session_id)
  call('DEL', leases, claimed, P .. 'ctl:' .. session_id)
end
return write_counters_and_return({ counts.requeued, counts.dead, counts.cancelled, #held - handled, counts.lost })
