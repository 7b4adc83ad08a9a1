-- How long a job will wait: what is thought to go before it, at the pace of late, over the slots that are taken now.
-- ``scheduling/prediction.py`` says the same, and why; ``prediction_rules`` brings its constants.
-- uses: records, counters, fairness, prediction_rules
-- rarely: predicted_wait

local KINDS = { ':waiting', ':leased', ':ran', ':ran_ms', ':ran_cost', unpack(COSTS) }
local LANES = { 'interactive', 'background', 'batch' }
local is_pool_read = {}
local own_jobs = {} -- by waiting stream: how many wait there, as far as this call has asked

-- What waits at a queue key costs: in all, and of the ``COSTS`` the retried, those between these and ``own_kind``, this one,
-- and in how many behind it something waits.
local function costs_around(key, own_kind)
  local all, retried, before, within, behind, is_before = 0, 0, 0, 0, 0, true
  for i, kind in ipairs(COSTS) do
    local cost = math.max(counter('counters', key .. kind), 0)
    all = all + cost
    if kind == own_kind then
      within, is_before = cost, false
    elseif i == 1 then
      retried = cost
    elseif is_before then
      before = before + cost
    elseif cost > 0 then
      behind = behind + 1
    end
  end
  return all, retried, before, within, behind
end

-- Of a job that comes to its queue key now, or before which ``own`` of its stream wait: the ms until it starts, nil if too
-- little was seen or nothing runs; and how many jobs go before it.
local function predicted_wait(job, own)
  local fields, sums, lane_of, is_above = {}, {}, without_region(job.lane), true
  if not is_pool_read[job.pool] then
    for _, lane in ipairs(LANES) do
      for _, kind in ipairs(KINDS) do fields[#fields + 1] = job.pool .. ':' .. lane .. kind end
    end
    read('counters', fields)
    is_pool_read[job.pool] = true
  end
  local ahead, jobs, below = 0, 0, 0
  for _, lane in ipairs(LANES) do
    local at = job.pool .. ':' .. lane
    for _, kind in ipairs(KINDS) do sums[kind] = (sums[kind] or 0) + counter('counters', at .. kind) end
    if lane == lane_of then
      is_above = false
    elseif is_above then
      ahead, jobs = ahead + costs_around(at), jobs + waiting(at)
    elseif waiting(at) > 0 then
      below = below + 1
    end
  end
  local at = queue_key(job)
  local of_band, is_new = at .. ':' .. job.band, job.queue == '' or string.sub(job.queue, 1, 2) == 'q:'
  local in_lane, tenants = waiting(at), 1
  local all, retried, bands, within, behind = costs_around(at, is_new and ':' .. job.band .. ':cost' or ':r:cost')
  if in_lane > 0 and all > 0 then
    if is_new then
      local queue = 'q:' .. of_band .. ':' .. job.tenant
      own = own or own_jobs[queue] or call('XLEN', P .. queue)
      own_jobs[queue], tenants = own, tenants_waiting(of_band)
    end
    local mean = all / in_lane
    local level = math.min((own or 0) * tenants * mean, within)
    local cost = behind > 0 and level * BAND_STEP / (BAND_STEP - 1) or level
    if is_new then
      retried = math.min(retried, (BAND_STEP - 1) * (bands + level + mean))
      cost = level + math.min(bands + retried, (BAND_CYCLE - 1) * (level + mean))
      cost = cost * BAND_CYCLE / (BAND_CYCLE - behind)
    end
    cost = math.min(cost, all)
    ahead, jobs = ahead + cost, jobs + math.floor(cost / mean + 0.5)
  end
  if sums[':ran'] < KNOWN_JOBS or sums[':ran_cost'] < 1 or sums[':leased'] < 1 then return nil, jobs end
  local pace, half = sums[':ran_ms'] / sums[':ran_cost'], sums[':ran_ms'] / sums[':ran'] / 2
  local wait = (ahead * pace * LANE_CYCLE / (LANE_CYCLE - below) + half) / sums[':leased']
  return math.floor(math.max(0, math.min(wait, MAX_WAIT_MS))), jobs
end
