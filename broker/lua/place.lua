-- Where waiting jobs stand.
-- ARGV: prefix, job ids.
-- Reply: per job {jobs that go before it, ms until it starts or -1 if that is unknown}; {} if it does not wait.
-- uses: prediction

local MAX_COUNTED = 32 -- behind these a job's place is told by when it came, between the first and the last

-- How many jobs of its stream go before a job.
local function jobs_before(job)
  local before = call('XRANGE', P .. job.queue, '-', '(' .. job.entry, 'COUNT', MAX_COUNTED)
  if #before < MAX_COUNTED then return #before end
  local last = call('XREVRANGE', P .. job.queue, '+', '-', 'COUNT', 1)[1]
  local came = {}
  for i, entry in ipairs({ before[1][1], job.entry, last[1] }) do came[i] = tonumber(string.match(entry, '^%d+')) end
  local part = came[3] > came[1] and (came[2] - came[1]) / (came[3] - came[1]) or 1
  return math.max(math.floor((call('XLEN', P .. job.queue) - 1) * part), MAX_COUNTED)
end

local answers = {}
for i = 2, #ARGV do
  local job, place = load_job(ARGV[i]), {}
  if job and job.state == 'queued' then
    local wait, jobs = predicted_wait(job, jobs_before(job))
    place = { jobs, wait or -1 }
  end
  answers[#answers + 1] = place
end
return answers
