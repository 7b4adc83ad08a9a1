-- How fast jobs are served, in ``counters`` by pool and lane: ``ran`` jobs (at most RATE_JOBS), the ms for which these had
-- a slot (``ran_ms``) and what they were thought to cost (``ran_cost``). Older ones fade by 1 in RATE_JOBS with each new
-- one, and with each FADE_MS that pass until it comes (``ran_at``). ``scheduling/prediction.py`` says the same, and why.
-- uses: records, counters, prediction_rules

local function observe(job, run_ms)
  if not run_ms then return end
  local at = job.pool .. ':' .. without_region(job.lane)
  read('counters', { at .. ':ran', at .. ':ran_ms', at .. ':ran_cost', at .. ':ran_at', at .. ':leased', at .. ':done' })
  local ran = counter('counters', at .. ':ran')
  local steps = math.max(math.floor((tonumber(job.at) - counter('counters', at .. ':ran_at')) / FADE_MS), 0)
  local left = math.max(math.floor(ran * (1 - 1 / RATE_JOBS) ^ steps + 0.5), math.min(ran, KNOWN_JOBS))
  local is_full = left >= RATE_JOBS
  add('counters', at .. ':ran_at', steps * FADE_MS)
  add('counters', at .. ':ran', left - ran + (is_full and 0 or 1))
  for kind, seen in pairs({ [':ran_ms'] = run_ms, [':ran_cost'] = tonumber(job.cost) }) do
    local was = counter('counters', at .. kind)
    local faded = math.floor(was * left / math.max(ran, 1))
    add('counters', at .. kind, faded - was + seen - (is_full and math.floor(faded / RATE_JOBS) or 0))
  end
end
