-- Says where a job stands after the server may have lost its latest writes. If it waits, its epoch is raised above all that
-- an attempt which those writes began could have.
-- ARGV: prefix, job id, the highest epoch that the Router has seen of it (0: none).
-- Reply: {state, epoch, attempt id ('' unless it runs)}; {'unknown', 0, ''}. A repeated call changes nothing more.
-- Invariants: 2 one result, 3 fence.
-- uses: epochs, records

local job = load_job(ARGV[2])
if not job then return { 'unknown', 0, '' } end
local epoch, above = tonumber(job.epoch), next_run(ARGV[3])
if job.state == 'queued' and epoch < above then
  epoch, job.epoch = above, int(above)
  save(job)
end
return { job.state, epoch, job.state == 'leased' and job.aid or '' }
