-- Keeps a reply stream, or makes it if it is not there, and drops what was read.
-- ARGV: prefix, its reader, ttl_ms, id of the last entry read ('0': none, or nothing is to be dropped).
-- Reply: 1 if it had to be made, else 0.
-- Invariant: 8 bounded memory (the sweep removes the streams whose readers are gone).

local reader, last = ARGV[2], ARGV[4]
local key = P .. 'reply:' .. reader
local made = call('EXISTS', key) == 0
if made then
  -- Going on from the last id read: with a clock that was set back, new entries would stand before it.
  call('XADD', key, last == '0' and '*' or last, 'o', 'open')
elseif last ~= '0' then
  call('XTRIM', key, 'MINID', last)
end
call('ZADD', P .. 'readers', int(now_ms() + tonumber(ARGV[3])), reader)
call('PEXPIRE', key, int(tonumber(ARGV[3]) + EXPIRY_SLACK_MS))
return made and 1 or 0
