-- Streams that one reader reads to their end, and keeps alive.
-- uses: shard

-- Makes a stream if it is not there (answers true), else drops what was read up to ``last`` ('0': nothing). A new one goes on
-- from there: with a clock that was set back, new entries would stand before it.
local function keep_stream(key, last, ttl_ms)
  local made = call('EXISTS', key) == 0
  if made then
    call('XADD', key, last == '0' and '*' or last, 'k', 'hello')
  elseif last ~= '0' then
    call('XTRIM', key, 'MINID', last)
  end
  call('PEXPIRE', key, int(ttl_ms + EXPIRY_SLACK_MS))
  return made
end
