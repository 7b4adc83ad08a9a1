-- Jobs whose output is kept. A listed one is kept however it ends, with what it has said so far.
-- uses: shard, clock, counters, listeners

local PERSISTED_BYTES = 1024 -- what such a job counts for in its tenant's budget, beside its metadata and output
local MAX_FINISHED = 100000 -- notices of ends that nobody has taken; beyond it the oldest are dropped

-- Counts bytes that are kept of a job among its tenant's.
local function count_bytes(job, bytes)
  add('budget', 't:' .. job.tenant .. ':persisted', bytes)
  call('HINCRBY', P .. 'job:' .. job.id, 'persisted_bytes', int(bytes))
end

-- Frees a job's idempotency key, unless that leads elsewhere now.
local function free_key(id, idem)
  local key = P .. 'idem:' .. (idem or '')
  local holder = (idem or '') ~= '' and call('GET', key)
  if holder and string.sub(holder, 1, string.len(id) + 1) == id .. ' ' then call('DEL', key) end
end

-- A listed job's member in its tenant's list: sorted by time of arrival, then by id.
local function list_member(id, at)
  return string.format('%015.0f ', tonumber(at)) .. id
end

-- Deletes what is kept of a job outside its record.
local function delete_persisted(job, bytes, idem, listed)
  call('DEL', P .. 'out:' .. job.id)
  add('budget', 't:' .. job.tenant .. ':persisted', -tonumber(bytes or 0))
  free_key(job.id, idem)
  if listed == '1' then call('ZREM', P .. 'listed:' .. job.tenant, list_member(job.id, job.at)) end
end

-- After a job ended. ``bytes`` to ``topic`` are fields of its record before. Only an answer keeps its idempotency key.
local function keep_or_drop_output(job, bytes, idem, retention_ms, topic)
  local key, now = P .. 'job:' .. job.id, now_ms()
  listeners_of(job)
  call('DEL', P .. 'listeners:' .. job.id)
  if (topic or '') ~= '' then
    local finished = P .. 'finished'
    call('XADD', finished, '*', 'id', job.id, 'tenant', job.tenant, 'state', job.state, 'topic', topic)
    if call('XLEN', finished) > MAX_FINISHED then
      call('HINCRBY', P .. 'finished_dropped', 'dropped', call('XTRIM', finished, 'MAXLEN', int(MAX_FINISHED)))
    end
  end
  if not job.is_kept then return delete_persisted(job, bytes, idem, job.listed) end
  if job.state ~= 'done' and job.state ~= 'failed' then free_key(job.id, idem) end
  local until_ms, ttl = int(now + tonumber(retention_ms)), int(tonumber(retention_ms) + EXPIRY_SLACK_MS)
  call('ZADD', P .. 'persisted', until_ms, job.id)
  call('PEXPIRE', P .. 'out:' .. job.id, ttl)
  if idem ~= '' then call('PEXPIRE', P .. 'idem:' .. idem, ttl) end
  call('HDEL', key, 'env', 'eligible_at', 'handed_back', 'avoid', 'avoid_until', 'suspicion', 'not_charged', 'cleared')
  call('HSET', key, 'ended_at', int(now), 'expires_at', until_ms, 'cause', string.sub(job.why or '', 1, 500))
end

