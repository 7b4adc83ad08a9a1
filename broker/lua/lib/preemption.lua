-- Preemption: interactive jobs that find no free slot have attempts of lower lanes yield. ``yieldable:<pool>``: running
-- jobs whose attempt may yield, by its start (queue ms), or, once it was asked, by minus the time of that; those at workers
-- of a region stand in ``yieldable:<pool>@<region>`` as well. Decides as scheduling/preemption.py does. ``resume`` of a job
-- that may yield is ``y`` and how often it may still, and with an attempt at a worker of a region ``@<region>``, or
-- ``=<region>`` at one that takes only that one's jobs and so stands in its set alone.
-- uses: records, counters, finish, suspicion

local ASK_AGAIN_MS = 2000
local MAX_VICTIMS = 16 -- looked at in one call
local LOWER_PART = 8 -- lower lanes keep this part of what runs: as claims give it to them

local function yields_left(job)
  return tonumber(string.match(job.resume, '^y(%d+)') or 0)
end

-- Writes to the sets in which an attempt at a job stands.
local function mark(job, command, ...)
  local set, kind, region = P .. 'yieldable:' .. job.pool, string.match(job.resume, '([@=])(.*)')
  if kind ~= '=' then call(command, set, ...) end
  if kind then call(command, set .. '@' .. region, ...) end
end

-- ``region``: of the worker as its claims say it, or ''. The job's record has to be saved.
local function note_start(job, now, region)
  if yields_left(job) == 0 or is_suspect(job) then return end
  job.resume = string.match(job.resume, '^y%d+') .. string.gsub(region, '^[^=]', '@%0')
  mark(job, 'ZADD', int(now), job.id)
end

local function note_end(job)
  if string.sub(job.resume, 1, 1) == 'y' then mark(job, 'ZREM', job.id) end
end

-- What decides whether attempts of a pool yield, in the order in which ``ask_to_yield`` reads it.
local function counts_for_yields(pool)
  return { pool .. ':interactive:leased', pool .. ':background:leased', pool .. ':batch:leased' }
end

-- Has the attempt that began last, of those at workers that may run what waits at a queue key, yield to an interactive job
-- there. Answers whether one was asked.
local function ask_to_yield(key, now)
  local pool, region = string.match(key, '^([^:]*):interactive(.*)$')
  if not pool then return false end
  local leased = counts_for_yields(pool)
  read('counters', leased)
  local lower = counter('counters', leased[2]) + counter('counters', leased[3])
  if lower * LOWER_PART <= lower + counter('counters', leased[1]) then return false end
  local yieldable, since = P .. 'yieldable:' .. pool .. region, int(ASK_AGAIN_MS - now)
  if call('ZCOUNT', yieldable, '-inf', '(' .. since) >= waiting(key) then return false end
  for _, id in ipairs(call('ZREVRANGEBYSCORE', yieldable, '+inf', since, 'LIMIT', 0, MAX_VICTIMS)) do
    local job = load_job(id)
    if job and job.state == 'leased' and call('XADD', P .. 'ctl:' .. job.owner, 'NOMKSTREAM', '*', 'k', 'yield',
        'job', id, 'aid', job.aid) then
      mark(job, 'ZADD', int(-now), id)
      total(job, 'asked_to_yield')
      return true
    end
    call('ZREM', yieldable, id)
  end
  return false
end
