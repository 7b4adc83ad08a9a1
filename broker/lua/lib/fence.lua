-- Checks whether a session or an attempt is still current.
-- uses: records, transitions

-- Whether a session was declared dead, or never joined. While its reclaim is under way its number is negative: another
-- Manager finds it standing still, and finishes what the first one began.
local function is_fenced(session_id)
  local number = call('HGET', P .. 'renewals', session_id)
  return not number or tonumber(number) < 0
end

-- The job if ``epoch`` and ``aid`` own it; else nil and the answer: gone, duplicate (this attempt itself ended
-- the job, or, for ``releasing``, handed it back) or fenced.
local function fence(id, epoch, aid, releasing)
  local job = load_job(id)
  if not job then return nil, 'gone' end
  local same = job.epoch == epoch and job.aid == aid
  if same and job.state == 'leased' then return job end
  if same and TERMINAL[job.state] then return nil, 'duplicate' end
  if releasing and job.handed_back == epoch .. ':' .. aid then return nil, 'duplicate' end
  return nil, 'fenced'
end
