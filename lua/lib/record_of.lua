-- record_of(text): a replica's record as a table, or nil if there is none or it does not parse: a
-- corrupt record counts as absent, so that its agent can register the replica again.
local function record_of(text)
  if not text then
    return nil
  end
  local parsed, record = pcall(cjson.decode, text)
  if parsed and type(record) == 'table' and type(record.state) == 'string'
    and type(record.gen) == 'number' then
    return record
  end
  return nil
end
