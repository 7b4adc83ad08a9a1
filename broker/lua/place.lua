-- Where waiting jobs stand.
-- ARGV: prefix, job ids.
-- Reply: per job {jobs that go before it, ms until it starts or -1 if that is unknown}; {} if it does not wait.
-- uses: prediction

local MAX_COUNTED = 1000
local answers = {}
for i = 2, #ARGV do
  local job, place = load_job(ARGV[i]), {}
  if job and job.state == 'queued' then
    local before = call('XRANGE', P .. job.queue, '-', '(' .. job.entry, 'COUNT', MAX_COUNTED)
    local wait, jobs = predicted_wait(job, #before)
    place = { jobs, wait or -1 }
  end
  answers[#answers + 1] = place
end
return answers
