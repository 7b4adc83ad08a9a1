-- A Router asks where a job stands after the server may have lost its latest writes. If it waits, its epoch is raised
-- above all that an attempt which those writes began could have.
-- ARGV: prefix, job id, the highest epoch that the Router has heard of it (0: none).
-- Reply: {state, epoch, attempt id ('' unless it runs)}; {'unknown', 0, ''} for a job that is unknown. A repeated call
--       changes nothing more.
-- Invariants: 2 one result, 3 fence.

local job = load_job(ARGV[2])
if not job then return { 'unknown', 0, '' } end
local epoch, above = tonumber(job.epoch), (math.floor(tonumber(ARGV[3]) / RUN_EPOCHS) + 1) * RUN_EPOCHS
if job.state == 'queued' and epoch < above then
  epoch = above
  call('HSET', P .. 'job:' .. job.id, 'epoch', int(epoch))
end
return { job.state, epoch, job.state == 'leased' and job.aid or '' }
