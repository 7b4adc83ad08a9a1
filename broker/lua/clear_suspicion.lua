-- Clears a running job of suspicion: it went on behind what it had put out when its engine crashed. Once: poison that puts
-- something out each time would travel with those it crashes.
-- ARGV: prefix, job id, epoch, attempt id.
-- Reply: 'ok', 'duplicate', 'fenced' or 'gone'.
-- Invariants: 3 fence, 13 liveness (its worker may hold the next suspect).
-- uses: fence, suspicion

local job, refusal = fence(ARGV[2], ARGV[3], ARGV[4])
if not job then return refusal end
if is_suspect(job) and job.cleared == '1' then return 'ok' end
call('HDEL', P .. 'job:' .. job.id, 'suspicion')
if not is_suspect(job) then return 'ok' end -- its worker may hold another one that is
call('HSET', P .. 'job:' .. job.id, 'cleared', '1')
call('HDEL', P .. 'claimed:' .. job.owner, 'suspect')
offer_next_suspect(job)
return 'ok'
