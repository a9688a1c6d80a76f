package server

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// field is a row of the table below. Exactly one of check and free is set.
type field struct {
	// check says why a role may not set the field as it is set in m, the message it is in; empty if it may. Of a list it
	// sees all.
	check func(s *Server, r *access.Role, m proto.Message) string
	// Also when it is not set: what stands for it could be more than the role allows.
	unset bool
	// Which of its parts count, of m, the message it is in; nil for all.
	only func(m proto.Message) []protoreflect.FieldDescriptor
	// free is the reason why it needs no leave beyond that of the call.
	free string
	// Its value is no secret: the audit log has it.
	audited bool
	// What an audit log has in place of its value.
	summary func(b auditBound, v protoreflect.Value) any
}

const (
	names = "says which workload: the table of methods is about that"
	// The others: see onSnapshot, and madeOf.
	namesSnapshot = "says which snapshot: the table of methods is about that"
	asMade        = "checked with the whole of what comes of it"
	inside        = "changes only what is inside the walls"
	answers       = "changes only the answer"
	parts         = "its parts have rows of their own"
	slower        = "slows it down, and nobody else; without it there is no limit"
)

// fields says of every field of every request what a role must allow for it to be set. A field that is not in it may be
// set by nobody who has less than everything; a test compares it with the API, so whoever adds a field decides here.
// The same message has the same row in whatever request it comes: creating, updating, explaining.
var fields = map[protoreflect.FullName]field{
	"sandboxd.v1.WorkloadSpec.image":          {check: onSpec((*Server).mayUse), unset: true, audited: true},
	"sandboxd.v1.WorkloadSpec.isolation":      {check: onSpec(mayIsolate), unset: true, audited: true},
	"sandboxd.v1.WorkloadSpec.process":        {free: parts},
	"sandboxd.v1.WorkloadSpec.resources":      {free: parts, unset: true},
	"sandboxd.v1.WorkloadSpec.hostname":       {free: "of its own UTS namespace or kernel", audited: true},
	"sandboxd.v1.WorkloadSpec.mounts":         {check: onSpec(mayMount), audited: true},
	"sandboxd.v1.WorkloadSpec.network":        {check: onSpec(mayConnect), audited: true},
	"sandboxd.v1.WorkloadSpec.read_only_root": {free: "takes something away", audited: true},
	"sandboxd.v1.WorkloadSpec.cap_add":        {check: onSpec(mayBeCapable), audited: true},
	"sandboxd.v1.WorkloadSpec.cap_drop":       {free: "takes something away", audited: true},
	"sandboxd.v1.WorkloadSpec.stop_signal":    {free: inside, audited: true},

	"sandboxd.v1.WorkloadSpec.snapshots": {free: "who may take one is a verb; how its agent is reached is the daemon's business", audited: true},

	"sandboxd.v1.WorkloadSpec.seccomp": {check: needs(access.Seccomp)},
	"sandboxd.v1.Seccomp.unconfined":   {free: "checked with the field that holds it", audited: true},
	"sandboxd.v1.Seccomp.profile":      {free: "checked with the field that holds it", summary: sized},

	"sandboxd.v1.Mount.type":       {free: "checked with the list of mounts", audited: true},
	"sandboxd.v1.Mount.source":     {free: "checked with the list of mounts", audited: true},
	"sandboxd.v1.Mount.target":     {free: inside, audited: true},
	"sandboxd.v1.Mount.read_only":  {free: "checked with the list of mounts", audited: true},
	"sandboxd.v1.Mount.size_bytes": {free: "of a tmpfs, whose pages count as the sandbox's memory", audited: true},
	"sandboxd.v1.Mount.mode":       {free: inside, audited: true},

	"sandboxd.v1.ProcessSpec.entrypoint":    {free: inside, summary: program},
	"sandboxd.v1.ProcessSpec.command":       {free: inside, summary: counted},
	"sandboxd.v1.ProcessSpec.env":           {free: inside, summary: variables},
	"sandboxd.v1.ProcessSpec.user":          {free: "a user of the image, mapped to none of the host's", audited: true},
	"sandboxd.v1.ProcessSpec.working_dir":   {free: inside, audited: true},
	"sandboxd.v1.ProcessSpec.terminal":      {free: inside, audited: true},
	"sandboxd.v1.ProcessSpec.stdin":         {free: inside, audited: true},
	"sandboxd.v1.ProcessSpec.terminal_size": {free: inside},
	"sandboxd.v1.ProcessSpec.rlimits":       {free: "the sandbox's cgroup bounds whatever they allow"},
	"sandboxd.v1.Rlimit.type":               {free: "the sandbox's cgroup bounds whatever it allows"},
	"sandboxd.v1.Rlimit.soft":               {free: "the sandbox's cgroup bounds whatever it allows"},
	"sandboxd.v1.Rlimit.hard":               {free: "the sandbox's cgroup bounds whatever it allows"},
	"sandboxd.v1.TerminalSize.rows":         {free: inside},
	"sandboxd.v1.TerminalSize.columns":      {free: inside},

	"sandboxd.v1.Resources.cpu_millis": {unset: true, audited: true, check: within("cpu_millis",
		func(r *sandboxdv1.Resources) uint64 { return uint64(r.GetCpuMillis()) },
		func(r *access.Role) uint64 { return uint64(r.Max.CPUMillis) }, uint64(workload.DefaultResources.CPUMillis))},
	"sandboxd.v1.Resources.memory_bytes": {unset: true, audited: true, check: within("memory",
		func(r *sandboxdv1.Resources) uint64 { return r.GetMemoryBytes() },
		func(r *access.Role) uint64 { return uint64(r.Max.Memory) }, workload.DefaultResources.MemoryBytes)},
	"sandboxd.v1.Resources.disk_bytes": {unset: true, audited: true, check: within("disk",
		func(r *sandboxdv1.Resources) uint64 { return r.GetDiskBytes() },
		func(r *access.Role) uint64 { return uint64(r.Max.Disk) }, workload.DefaultResources.DiskBytes)},
	"sandboxd.v1.Resources.pids": {unset: true, audited: true, check: within("pids",
		func(r *sandboxdv1.Resources) uint64 { return uint64(r.GetPids()) },
		func(r *access.Role) uint64 { return uint64(r.Max.Pids) }, uint64(workload.DefaultResources.Pids))},
	// The daemon's disk, not the sandbox's.
	"sandboxd.v1.Resources.log_bytes": {unset: true, audited: true, check: within("log",
		func(r *sandboxdv1.Resources) uint64 { return r.GetLogBytes() },
		func(r *access.Role) uint64 { return uint64(r.Max.Log) }, workload.DefaultResources.LogBytes)},
	"sandboxd.v1.Resources.cpu_weight":        {check: needs(access.Placement), audited: true},
	"sandboxd.v1.Resources.cpuset_cpus":       {check: needs(access.Placement), audited: true},
	"sandboxd.v1.Resources.swap_bytes":        {check: needs(access.Swap), audited: true},
	"sandboxd.v1.Resources.memory_high_bytes": {free: slower, audited: true},
	"sandboxd.v1.Resources.oom_group":         {free: "which of its own processes are killed", audited: true},
	"sandboxd.v1.Resources.io_read_bps": {unset: true, audited: true, check: withinRate("io_read_bps",
		func(r *sandboxdv1.Resources) uint64 { return r.GetIoReadBps() },
		func(r *access.Role) uint64 { return uint64(r.Max.IOReadBPS) })},
	"sandboxd.v1.Resources.io_write_bps": {unset: true, audited: true, check: withinRate("io_write_bps",
		func(r *sandboxdv1.Resources) uint64 { return r.GetIoWriteBps() },
		func(r *access.Role) uint64 { return uint64(r.Max.IOWriteBPS) })},
	"sandboxd.v1.Resources.io_read_iops": {unset: true, audited: true, check: withinRate("io_read_iops",
		func(r *sandboxdv1.Resources) uint64 { return uint64(r.GetIoReadIops()) },
		func(r *access.Role) uint64 { return uint64(r.Max.IOReadIOPS) })},
	"sandboxd.v1.Resources.io_write_iops": {unset: true, audited: true, check: withinRate("io_write_iops",
		func(r *sandboxdv1.Resources) uint64 { return uint64(r.GetIoWriteIops()) },
		func(r *access.Role) uint64 { return uint64(r.Max.IOWriteIOPS) })},

	"sandboxd.v1.CreateWorkloadRequest.name":   {free: "names are the whole host's; a taken one is refused", audited: true},
	"sandboxd.v1.CreateWorkloadRequest.labels": {check: labelsFit, unset: true, audited: true},
	"sandboxd.v1.CreateWorkloadRequest.spec":   {free: parts},
	// Whoever knew it could do no more with it than who made it.
	"sandboxd.v1.CreateWorkloadRequest.idempotency_key": {free: "finds only what this caller made with it", audited: true},
	"sandboxd.v1.ExplainRequest.name":                   {free: answers},
	"sandboxd.v1.ExplainRequest.labels":                 {check: labelsFit, unset: true},
	"sandboxd.v1.ExplainRequest.spec":                   {free: parts},

	"sandboxd.v1.RunWorkloadRequest.name":              {free: "as in a creation", audited: true},
	"sandboxd.v1.RunWorkloadRequest.labels":            {check: labelsFit, unset: true, audited: true},
	"sandboxd.v1.RunWorkloadRequest.spec":              {free: parts},
	"sandboxd.v1.RunWorkloadRequest.idempotency_key":   {free: "finds only what this caller made with it", audited: true},
	"sandboxd.v1.RunWorkloadRequest.remove_when_ended": {check: mayRemoveOwn, audited: true},
	"sandboxd.v1.RunWorkloadRequest.detach":            {free: answers, audited: true},
	"sandboxd.v1.RunWorkloadRequest.progress":          {free: answers},

	"sandboxd.v1.StartWorkloadRequest.id":         {free: names, audited: true},
	"sandboxd.v1.GetWorkloadRequest.id":           {free: names},
	"sandboxd.v1.StopWorkloadRequest.id":          {free: names, audited: true},
	"sandboxd.v1.StopWorkloadRequest.grace":       {free: inside, audited: true},
	"sandboxd.v1.KillWorkloadRequest.id":          {free: names, audited: true},
	"sandboxd.v1.KillWorkloadRequest.signal":      {free: inside, audited: true},
	"sandboxd.v1.WaitWorkloadRequest.id":          {free: names},
	"sandboxd.v1.DeleteWorkloadRequest.id":        {free: names, audited: true},
	"sandboxd.v1.DeleteWorkloadRequest.force":     {free: "whoever may delete may kill", audited: true},
	"sandboxd.v1.UpdateWorkloadRequest.id":        {free: names, audited: true},
	"sandboxd.v1.UpdateWorkloadRequest.resources": {free: parts, only: changes},
	// Sets nothing by itself: the row above follows it.
	"sandboxd.v1.UpdateWorkloadRequest.update_mask": {free: "checked with the resources it names", audited: true},
	"sandboxd.v1.PauseWorkloadRequest.id":           {free: names, audited: true},
	"sandboxd.v1.ResumeWorkloadRequest.id":          {free: names, audited: true},
	"sandboxd.v1.GetUsageRequest.id":                {free: names},
	"sandboxd.v1.GetOCIConfigRequest.id":            {free: names},
	"sandboxd.v1.StreamLogsRequest.id":              {free: names},
	"sandboxd.v1.StreamLogsRequest.follow":          {free: answers},
	"sandboxd.v1.StreamLogsRequest.console":         {free: "what the workload's own kernel and QEMU say: the workload can write it, too"},
	"sandboxd.v1.StreamLogsRequest.tail":            {free: answers},
	"sandboxd.v1.StreamLogsRequest.since":           {free: answers},
	"sandboxd.v1.WatchEventsRequest.id":             {free: names},
	"sandboxd.v1.WatchEventsRequest.since":          {free: answers},
	"sandboxd.v1.ListUsageRequest.labels":           {free: answers},
	"sandboxd.v1.ListUsageRequest.isolation":        {free: answers},
	"sandboxd.v1.ListUsageRequest.page_size":        {free: answers},
	"sandboxd.v1.ListUsageRequest.page_token":       {free: "a place in the order of workloads; what is behind it is filtered"},
	"sandboxd.v1.ListWorkloadsRequest.labels":       {free: answers},
	"sandboxd.v1.ListWorkloadsRequest.states":       {free: answers},
	"sandboxd.v1.ListWorkloadsRequest.isolation":    {free: answers},
	"sandboxd.v1.ListWorkloadsRequest.page_size":    {free: answers},
	"sandboxd.v1.ListWorkloadsRequest.page_token":   {free: "a place in the order of workloads; what is behind it is filtered"},

	"sandboxd.v1.ExecRequest.start":       {free: parts},
	"sandboxd.v1.ExecRequest.stdin":       {free: inside},
	"sandboxd.v1.ExecRequest.close_stdin": {free: inside},
	"sandboxd.v1.ExecRequest.resize":      {free: inside},
	"sandboxd.v1.ExecRequest.signal":      {free: inside},
	"sandboxd.v1.ExecStart.id":            {free: names, audited: true},
	"sandboxd.v1.ExecStart.command":       {free: inside, summary: program},
	"sandboxd.v1.ExecStart.env":           {free: inside, summary: variables},
	"sandboxd.v1.ExecStart.user":          {free: "a user of the image, mapped to none of the host's; the workload's capabilities bound it", audited: true},
	"sandboxd.v1.ExecStart.working_dir":   {free: inside, audited: true},
	"sandboxd.v1.ExecStart.terminal":      {free: inside, audited: true},
	"sandboxd.v1.ExecStart.stdin":         {free: inside, audited: true},
	"sandboxd.v1.ExecStart.terminal_size": {free: inside},
	"sandboxd.v1.ExecStart.output_pipes":  {free: "pipes made for this very caller, who alone reads from them"},

	"sandboxd.v1.AttachRequest.start":       {free: parts},
	"sandboxd.v1.AttachRequest.stdin":       {free: inside},
	"sandboxd.v1.AttachRequest.close_stdin": {free: inside},
	"sandboxd.v1.AttachRequest.resize":      {free: inside},
	"sandboxd.v1.AttachRequest.signal":      {free: inside},
	"sandboxd.v1.AttachStart.id":            {free: names, audited: true},
	"sandboxd.v1.AttachStart.from_start":    {free: answers, audited: true},

	"sandboxd.v1.CopyInRequest.start": {free: parts},
	"sandboxd.v1.CopyInRequest.data":  {free: inside},
	"sandboxd.v1.CopyInStart.id":      {free: names, audited: true},
	"sandboxd.v1.CopyInStart.path":    {free: "resolved inside the walls, by their agent", audited: true},
	"sandboxd.v1.CopyOutRequest.id":   {free: names, audited: true},
	"sandboxd.v1.CopyOutRequest.path": {free: "resolved inside the walls, by their agent", audited: true},

	"sandboxd.v1.ImportImageRequest.start":     {free: parts},
	"sandboxd.v1.ImportImageRequest.data":      {free: "images are data; whoever uses it asks for it by its name"},
	"sandboxd.v1.ImportImageStart.name":        {check: mayAdd, unset: true, audited: true},
	"sandboxd.v1.PullImageRequest.reference":   {check: mayAdd, unset: true, audited: true},
	"sandboxd.v1.PullImageRequest.insecure":    {check: mayPullInsecurely, audited: true},
	"sandboxd.v1.GetImageRequest.reference":    {check: maySeeImage, unset: true},
	"sandboxd.v1.RemoveImageRequest.reference": {check: mayRemoveImage, unset: true, audited: true},
	"sandboxd.v1.ListImagesRequest.page_size":  {free: answers},
	"sandboxd.v1.ListImagesRequest.page_token": {free: "a place in the order of images; what is behind it is filtered"},

	"sandboxd.v1.BuildTemplateRequest.image":             {check: mayBuildOf, unset: true, audited: true},
	"sandboxd.v1.BuildTemplateRequest.resources":         {free: parts, unset: true},
	"sandboxd.v1.BuildTemplateRequest.labels":            {check: labelsFit, unset: true, audited: true},
	"sandboxd.v1.BuildTemplateRequest.network":           {free: "its card leads nowhere", audited: true},
	"sandboxd.v1.CreateSnapshotRequest.id":               {free: names, audited: true},
	"sandboxd.v1.CreateSnapshotRequest.name":             {free: "names are the whole host's; a taken one is refused", audited: true},
	"sandboxd.v1.DeleteSnapshotRequest.snapshot":         {free: namesSnapshot, audited: true},
	"sandboxd.v1.RestoreSnapshotRequest.snapshot":        {free: namesSnapshot, audited: true},
	"sandboxd.v1.RestoreSnapshotRequest.name":            {free: "as in a creation", audited: true},
	"sandboxd.v1.RestoreSnapshotRequest.labels":          {free: asMade, audited: true},
	"sandboxd.v1.RestoreSnapshotRequest.hostname":        {free: "of its own kernel", audited: true},
	"sandboxd.v1.RestoreSnapshotRequest.idempotency_key": {free: "finds only what this caller made with it", audited: true},
	"sandboxd.v1.ForkWorkloadRequest.id":                 {free: names, audited: true},
	"sandboxd.v1.ForkWorkloadRequest.name":               {free: "as in a creation", audited: true},
	"sandboxd.v1.ForkWorkloadRequest.labels":             {free: asMade, audited: true},
	"sandboxd.v1.ForkWorkloadRequest.hostname":           {free: "of its own kernel", audited: true},
	"sandboxd.v1.ForkWorkloadRequest.idempotency_key":    {free: "finds only what this caller made with it", audited: true},

	"sandboxd.v1.RemoveTemplateRequest.id": {free: "templates have no owners: who may remove one may remove all", audited: true},
}

// onSpec makes a check of one on a workload's spec.
func onSpec(check func(*Server, *access.Role, *sandboxdv1.WorkloadSpec) string) func(*Server, *access.Role, proto.Message) string {
	return func(s *Server, r *access.Role, m proto.Message) string {
		return check(s, r, m.(*sandboxdv1.WorkloadSpec))
	}
}

// needs makes a check of a field that only a role with a privilege may set.
func needs(p access.Privilege) func(*Server, *access.Role, proto.Message) string {
	return func(_ *Server, r *access.Role, _ proto.Message) string { return r.Has(p) }
}

func within(what string, asked func(*sandboxdv1.Resources) uint64, most func(*access.Role) uint64, byDefault uint64) func(*Server, *access.Role, proto.Message) string {
	return func(_ *Server, r *access.Role, m proto.Message) string {
		return r.Within(what, asked(m.(*sandboxdv1.Resources)), most(r), byDefault)
	}
}

// withinRate is within for what has no limit by default.
func withinRate(what string, asked func(*sandboxdv1.Resources) uint64, most func(*access.Role) uint64) func(*Server, *access.Role, proto.Message) string {
	return func(_ *Server, r *access.Role, m proto.Message) string {
		return r.WithinRate(what, asked(m.(*sandboxdv1.Resources)), most(r))
	}
}

// changes are the fields of its resources that an update changes, as the handler will: a zero that its mask does not name
// stands for no default. Of a request that the handler will refuse, none.
func changes(m proto.Message) []protoreflect.FieldDescriptor {
	changed, err := changedFields(m.(*sandboxdv1.UpdateWorkloadRequest))
	if err != nil {
		return nil
	}
	return changed
}

func mayIsolate(_ *Server, r *access.Role, w *sandboxdv1.WorkloadSpec) string {
	return r.Isolates(isolations.fromAPI(w.GetIsolation()))
}

func mayConnect(_ *Server, r *access.Role, w *sandboxdv1.WorkloadSpec) string {
	return r.Connects(w.GetNetwork())
}

func mayBeCapable(_ *Server, r *access.Role, w *sandboxdv1.WorkloadSpec) string {
	for _, c := range w.GetCapAdd() {
		if why := r.Capable(c); why != "" {
			return why
		}
	}
	return ""
}

func mayMount(_ *Server, r *access.Role, w *sandboxdv1.WorkloadSpec) string {
	for _, m := range w.GetMounts() {
		// Whatever is no tmpfs shows something of the host.
		if mountTypes.fromAPI(m.GetType()) == spec.MountTmpfs {
			continue
		}
		if why := r.Mounts(m.GetSource(), m.GetReadOnly()); why != "" {
			return why
		}
	}
	return ""
}

func mayRemoveOwn(_ *Server, r *access.Role, _ proto.Message) string {
	if r.Allows(access.Delete) {
		return ""
	}
	return fmt.Sprintf("may: it does not say %q", access.Delete)
}

func labelsFit(_ *Server, r *access.Role, m proto.Message) string {
	return r.Fits(m.(interface{ GetLabels() map[string]string }).GetLabels())
}

func mayPullInsecurely(_ *Server, r *access.Role, m proto.Message) string {
	if !m.(*sandboxdv1.PullImageRequest).GetInsecure() {
		return ""
	}
	return r.Has(access.InsecurePull)
}
