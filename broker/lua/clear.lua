-- Clears a running job of suspicion: it went on behind what it had put out when its engine crashed, and lives. Once: who
-- is under suspicion again stays so, or poison that puts something out each time would travel with those it crashes.
-- ARGV: prefix, job id, epoch, attempt id.
-- Reply: 'ok', 'duplicate', 'fenced' or 'gone'.
-- Invariants: 3 fence, 13 liveness (its worker may hold the next suspect).

local job, refusal = fence(ARGV[2], ARGV[3], ARGV[4])
if not job then return refusal end
if is_suspect(job) and job.cleared == '1' then return 'ok' end
call('HDEL', P .. 'job:' .. job.id, 'suspicion')
if not is_suspect(job) then return 'ok' end -- its worker may hold another one that is
call('HSET', P .. 'job:' .. job.id, 'cleared', '1')
call('HDEL', P .. 'claimed:' .. job.owner, 'suspect')
if call('EXISTS', P .. 'suspects:' .. place(job)) == 1 then
  call('XADD', P .. 'ctl:' .. job.owner, 'NOMKSTREAM', '*', 'k', 'wake')
end
return 'ok'
