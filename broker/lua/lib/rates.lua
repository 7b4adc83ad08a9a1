-- How fast jobs are served, in ``counters`` by pool and lane: ``ran`` jobs (at most RATE_JOBS), the ms for which these had
-- a slot (``ran_ms``) and what they were thought to cost (``ran_cost``). Older ones fade by 1 in RATE_JOBS each time.
-- uses: records, counters

local RATE_JOBS = 64

local function observe(job, run_ms)
  if not run_ms then return end
  local at = job.pool .. ':' .. without_region(job.lane)
  read('counters', { at .. ':ran', at .. ':ran_ms', at .. ':ran_cost', at .. ':leased', at .. ':done' })
  local full = counter('counters', at .. ':ran') >= RATE_JOBS
  if not full then add('counters', at .. ':ran', 1) end
  for kind, seen in pairs({ [':ran_ms'] = run_ms, [':ran_cost'] = tonumber(job.cost) }) do
    add('counters', at .. kind, seen - (full and math.floor(counter('counters', at .. kind) / RATE_JOBS) or 0))
  end
end
