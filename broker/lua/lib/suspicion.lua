-- Jobs during which engines crashed. A crash of its engine makes a suspect of a job, the death of its worker at the second
-- time. Suspects wait in a line of their own, and a worker holds at most one of them.
-- uses: records

local SUSPECT = 2

local function is_suspect(job)
  return job.suspicion ~= '' and tonumber(job.suspicion) >= SUSPECT
end

-- Whether the suspect that a worker was given last, '<job id> <attempt id>', still runs.
local function still_runs(attempt)
  local id, aid = string.match(attempt or '', '(%S+) (%S+)')
  local job = id and load_job(id)
  return job and job.state == 'leased' and job.aid == aid
end

-- The owner of a suspect that is one no more, or has ended, may hold the next one.
local function offer_next_suspect(job)
  if call('EXISTS', P .. 'suspects:' .. queue_key(job)) == 1 then
    call('XADD', P .. 'ctl:' .. job.owner, 'NOMKSTREAM', '*', 'k', 'wake')
  end
end
