-- Tenants of a band take turns by start-time fair queueing with one unit a job (Goyal, Vin, Cheng: Start-time Fair Queueing,
-- SIGCOMM 1996). ``active:<key>``: waiting tenants by virtual start time; ``service:<key>``: where the last job of each
-- ended, and as ``*`` the band's clock. The latter is forgotten after an hour without competition.
-- uses: shard

-- A tenant that comes (back) starts at the band's clock, or where its last job ended: leaving and returning gains nothing.
local function activate(key, tenant)
  local active, service = P .. 'active:' .. key, P .. 'service:' .. key
  if call('ZSCORE', active, tenant) then return end
  local served = call('ZMSCORE', service, '*', tenant)
  local least = tonumber(call('ZRANGE', active, 0, 0, 'WITHSCORES')[2] or 0)
  call('ZADD', active, int(math.max(tonumber(served[1] or 0), tonumber(served[2] or 0), least)), tenant)
end

-- One unit of service for the tenant that was served least, and competes with others.
local function charge(key, tenant, start)
  local service = P .. 'service:' .. key
  call('ZADD', P .. 'active:' .. key, 'XX', int(start + 1), tenant)
  call('ZREMRANGEBYSCORE', service, '-inf', '(' .. int(start))
  call('ZADD', service, int(start), '*', int(start + 1), tenant)
  call('PEXPIRE', service, 3600000)
end
