-- Tenants of a band take turns by tokens: a virtual token counter (Sheng et al., Fairness in Serving Large Language Models,
-- OSDI 2024) for each, charged by a job's cost over its tenant's weight. ``active:<key>``: the waiting tenants by their
-- counters; ``service:<key>``: where those stand that have left, and as ``*`` the one that left last. Forgotten: who stands
-- below all that wait, for it would be lifted; and all after an hour in which nobody left. ``scheduling/fairness.py`` says
-- the same.
-- uses: records
-- rarely: correct

local SERVICE_TTL_MS = 3600000
local is_active, sizes = {}, {} -- what this call knows of who waits, and of how many do

local function exact(units)
  return string.format('%.3f', units)
end

-- A tenant that comes (back) is lifted to the least of those that wait, or to the one that left last: idle time earns
-- nothing.
local function activate(key, tenant)
  local active, name = P .. 'active:' .. key, key .. ' ' .. tenant
  if is_active[name] then return end
  is_active[name] = true
  if call('ZSCORE', active, tenant) then return end
  sizes[key] = nil
  local served = call('ZMSCORE', P .. 'service:' .. key, '*', tenant)
  local least = call('ZRANGE', active, 0, 0, 'WITHSCORES')[2] or served[1]
  call('ZADD', active, exact(math.max(tonumber(served[2] or 0), tonumber(least or 0))), tenant)
end

-- Notes where a tenant stands that goes on waiting, or waits no more. ``stands``: nil if nothing has changed that.
local function move(key, tenant, stands, leaves)
  local active, service = P .. 'active:' .. key, P .. 'service:' .. key
  if not leaves then return stands and call('ZADD', active, 'XX', exact(stands), tenant) end
  is_active[key .. ' ' .. tenant], sizes[key] = nil, nil
  stands = stands or tonumber(call('ZSCORE', active, tenant) or 0)
  call('ZREM', active, tenant)
  call('ZREMRANGEBYSCORE', service, '-inf', '(' .. (call('ZRANGE', active, 0, 0, 'WITHSCORES')[2] or exact(stands)))
  call('ZADD', service, exact(stands), '*', exact(stands), tenant)
  call('PEXPIRE', service, SERVICE_TTL_MS)
end

-- How many tenants of a band wait.
local function tenants_waiting(key)
  sizes[key] = sizes[key] or call('ZCARD', P .. 'active:' .. key)
  return sizes[key]
end

-- What its tenant is charged for an attempt at a job.
local function charge_of(job)
  return tonumber(job.cost) / tonumber(job.weight)
end

local corrections = {}

-- Notes by how much the tenant of a job was charged too little for its attempt: where its region's workers took it, that
-- stands behind ``charged``.
local function note_correction(job, used)
  local charged, region = string.match(job.charged, '^([^@]+)(.*)$')
  if not charged then return end
  local key, by = queue_key(job) .. region .. ':' .. job.band, used / tonumber(job.weight) - tonumber(charged)
  local name = key .. ' ' .. job.tenant
  local one = corrections[name] or { key = key, tenant = job.tenant, by = 0 }
  corrections[name], one.by = one, one.by + tonumber(exact(by))
end

-- Charges what was noted.
local function write_corrections()
  for _, one in pairs(corrections) do
    local service = P .. 'service:' .. one.key
    if not call('ZADD', P .. 'active:' .. one.key, 'XX', 'INCR', exact(one.by), one.tenant) then
      local served = call('ZMSCORE', service, '*', one.tenant)
      local stands = served[2] or one.by > 0 and served[1]
      if stands then call('ZADD', service, exact(tonumber(stands) + one.by), one.tenant) end
    end
  end
  corrections = {}
end

-- Charges the tenant of a job for what its attempt was charged too little.
local function correct(job, used)
  note_correction(job, used)
  write_corrections()
end
