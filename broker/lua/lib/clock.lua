-- The queue's clock (ms). It goes on from where it stood when the server's clock steps, restarts or fails over.
-- uses: shard

local CLOCK_GAP_MS = 10000 -- calls of a live fleet are never further apart: beyond it the server's clock stepped
local CLOCK_GAP_COUNTS_MS = 1000 -- what counts of such a gap, until a caller that measured it says more
local CLOCK_WRITTEN_MS = 200
local clock = nil

local function server_ms()
  local time = call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Where a clock stands that was written as ``<server ms> <queue ms>``, and what to write of it now, if anything.
-- ``at_least``: a caller measured on its own clock that it is so late.
local function clock_after(written, at_least)
  local server = server_ms()
  local was_server, was = string.match(written or '', '^(%d+) (%d+)$')
  local passed = server - tonumber(was_server or server)
  local counts = passed > CLOCK_GAP_MS and CLOCK_GAP_COUNTS_MS or math.max(passed, 0)
  local now = math.max(was and tonumber(was) + counts or server, at_least or 0)
  local is_due = not was or at_least or passed < 0 or passed >= CLOCK_WRITTEN_MS
  return now, is_due and int(server) .. ' ' .. int(now)
end

local function now_ms(at_least)
  if clock and not at_least then return clock end
  local written
  clock, written = clock_after(call('GET', P .. 'clock'), at_least)
  if written then call('SET', P .. 'clock', written) end
  return clock
end
