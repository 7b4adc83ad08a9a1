-- What every script of a shard begins with. KEYS[1] is a key of the shard (it routes the call on Redis Cluster), ARGV[1] the
-- prefix of the shard's keys. Names of pools, tenants and regions arrive percent-encoded.
-- A script does not roll back: it reads and decides first, and writes only what cannot fail.

local P = ARGV[1]
local call = redis.call
local unpack = unpack or table.unpack
local TOMBSTONE_MS = 60000
local CONTROL_TTL_MS = 60000
-- The server expires keys by its own clock, which may step: what must end on time is ended by a script, on the queue's.
local EXPIRY_SLACK_MS = 86400000

local function int(number)
  return string.format('%.0f', number)
end
