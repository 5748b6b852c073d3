// Filled in the next commits.
namespace fibkv {}
