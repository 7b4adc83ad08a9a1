-- How long a job will wait: what is thought to go before it, at the pace of late, over the slots that are taken now.
-- ``scheduling/prediction.py`` says the same, and why.
-- uses: records, counters, fairness
-- rarely: predicted_wait

local KINDS = { ':waiting', ':cost', ':leased', ':ran', ':ran_ms', ':ran_cost' }
local LANES = { 'interactive', 'background', 'batch' }
local KNOWN_JOBS, LANE_CYCLE, MAX_WAIT_MS = 8, 16, 1e10
local is_pool_read = {}
local own_jobs = {} -- by waiting stream: how many wait there, as far as this call has asked

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
      ahead, jobs = ahead + counter('counters', at .. ':cost'), jobs + waiting(at)
    elseif waiting(at) > 0 then
      below = below + 1
    end
  end
  local at = queue_key(job)
  local in_lane, tenants, of_band = waiting(at), 1, at .. ':' .. job.band
  local queue = job.queue ~= '' and job.queue or 'q:' .. of_band .. ':' .. job.tenant
  if in_lane > 0 and string.sub(queue, 1, 2) == 'q:' then
    own = own or own_jobs[queue] or call('XLEN', P .. queue)
    own_jobs[queue], tenants = own, tenants_waiting(of_band)
  end
  local before = math.min((own or 0) * tenants, in_lane)
  if in_lane > 0 then ahead = ahead + counter('counters', at .. ':cost') * before / in_lane end
  if sums[':ran'] < KNOWN_JOBS or sums[':ran_cost'] < 1 or sums[':leased'] < 1 then return nil, jobs + before end
  local pace, half = sums[':ran_ms'] / sums[':ran_cost'], sums[':ran_ms'] / sums[':ran'] / 2
  local wait = (ahead * pace * LANE_CYCLE / (LANE_CYCLE - below) + half) / sums[':leased']
  return math.floor(math.max(0, math.min(wait, MAX_WAIT_MS))), jobs + before
end
