-- Tenants of a band take turns by tokens: a virtual token counter (Sheng et al., Fairness in Serving Large Language Models,
-- OSDI 2024) for each, charged by a job's cost over its tenant's weight. ``active:<key>``: the waiting tenants by their
-- counters; ``service:<key>``: where those stand that have left, and as ``*`` the one that left last. Forgotten: who stands
-- below all that wait, for it would be lifted; and all after an hour in which nobody left. ``scheduling/fairness.py`` says
-- the same.
-- uses: records
-- rarely: correct

local SERVICE_TTL_MS = 3600000

local function exact(units)
  return string.format('%.3f', units)
end

-- A tenant that comes (back) is lifted to the least of those that wait, or to the one that left last: idle time earns
-- nothing.
local function activate(key, tenant)
  local active = P .. 'active:' .. key
  if call('ZSCORE', active, tenant) then return end
  local served = call('ZMSCORE', P .. 'service:' .. key, '*', tenant)
  local least = call('ZRANGE', active, 0, 0, 'WITHSCORES')[2] or served[1]
  call('ZADD', active, exact(math.max(tonumber(served[2] or 0), tonumber(least or 0))), tenant)
end

-- Notes where a tenant stands that goes on waiting, or waits no more. ``stands``: nil if nothing has changed that.
local function move(key, tenant, stands, leaves)
  local active, service = P .. 'active:' .. key, P .. 'service:' .. key
  if not leaves then return stands and call('ZADD', active, 'XX', exact(stands), tenant) end
  stands = stands or tonumber(call('ZSCORE', active, tenant) or 0)
  call('ZREM', active, tenant)
  call('ZREMRANGEBYSCORE', service, '-inf', '(' .. (call('ZRANGE', active, 0, 0, 'WITHSCORES')[2] or exact(stands)))
  call('ZADD', service, exact(stands), '*', exact(stands), tenant)
  call('PEXPIRE', service, SERVICE_TTL_MS)
end

-- What its tenant is charged for an attempt at a job.
local function charge_of(job)
  return tonumber(job.cost) / tonumber(job.weight)
end

-- Charges the tenant of a job whose attempt was charged for more: where its region's workers took it, that stands behind
-- ``charged``.
local function correct(job, used)
  local charged, region = string.match(job.charged, '^([^@]+)(.*)$')
  if not charged then return end
  local key, by = queue_key(job) .. region .. ':' .. job.band, used / tonumber(job.weight) - tonumber(charged)
  local service = P .. 'service:' .. key
  if call('ZADD', P .. 'active:' .. key, 'XX', 'INCR', exact(by), job.tenant) then return end
  local served = call('ZMSCORE', service, '*', job.tenant)
  local stands = served[2] or by > 0 and served[1]
  if stands then call('ZADD', service, exact(tonumber(stands) + tonumber(exact(by))), job.tenant) end
end
