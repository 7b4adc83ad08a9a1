-- Raises a worker's renewal number, which keeps all its leases, and its control stream alive.
-- ARGV: prefix, session id, id of the last control message read (older ones are trimmed).
-- Reply: the new number, or -1 if the session id was declared dead.
-- Invariant: 3 fence (the dead do not come back).

local session_id = ARGV[2]
if is_fenced(session_id) then return -1 end
now_ms() -- the queue's clock goes on also while no Manager acts
local control = P .. 'ctl:' .. session_id
if call('EXISTS', control) == 0 then
  -- Going on from the last id read: with a clock that was set back, new messages would stand before it.
  call('XADD', control, ARGV[3] == '0' and '*' or ARGV[3], 'k', 'hello')
else
  call('XTRIM', control, 'MINID', ARGV[3])
end
call('PEXPIRE', control, int(CONTROL_TTL_MS + EXPIRY_SLACK_MS))
return call('HINCRBY', P .. 'beats', session_id, 1)
