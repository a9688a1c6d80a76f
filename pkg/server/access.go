package server

import (
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
)

// subject is what a call is about, and so what a role's limits are compared with.
type subject int

const (
	// The row's verb alone decides; what is in the request is compared field by field, as with every subject.
	_ subject = iota
	// onWorkload: the one that the request's id names, in the request itself or in its start. One the caller may not
	// see is not found.
	onWorkload
	// onVisible: the answer holds only what the caller may see; the handler sees to it. An id, if there is one, is
	// treated as onWorkload's.
	onVisible
	// onRequest: what the request asks for, field by field, and its labels.
	onRequest
	// onSnapshot: the one that the request's snapshot names. It is its workload's owner's, and has that one's labels. One the
	// caller may not see is not found.
	onSnapshot
)

// row is a row of the table below. The zero value lets nobody in.
type row struct {
	// What a role must allow.
	verb access.Verb
	// And these, the same role.
	also []access.Verb
	// In place of a verb: whoever could open the socket, provided the transport proved who it is.
	open bool
	on   subject
	// The call changes something, or could, or lets out what may be secret: the audit log has it.
	audited bool
	// The call lasts as long as its caller likes, so a daemon that stops ends it at once instead of waiting for it.
	long bool
}

// methods says who may call what. A method that is not in it may be called by nobody; a test compares it with what is
// registered. Besides, each field of a request has a row in fields.
var methods = map[string]row{
	sandboxdv1.WorkloadService_CreateWorkload_FullMethodName: {verb: access.Create, on: onRequest, audited: true},
	// What is created has the caller for its owner and labels that fit, so whoever may do these things may do them to it; what is
	// to be removed has a row in fields.
	sandboxdv1.WorkloadService_RunWorkload_FullMethodName:   {verb: access.Create, also: []access.Verb{access.Control, access.View}, on: onRequest, audited: true, long: true},
	sandboxdv1.WorkloadService_StartWorkload_FullMethodName: {verb: access.Control, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_GetWorkload_FullMethodName:   {verb: access.View, on: onWorkload},
	sandboxdv1.WorkloadService_ListWorkloads_FullMethodName: {verb: access.View, on: onVisible},
	sandboxdv1.WorkloadService_StopWorkload_FullMethodName:  {verb: access.Control, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_KillWorkload_FullMethodName:  {verb: access.Control, on: onWorkload, audited: true},
	// What an update asks for has rows in fields, as a creation has; the policy is asked again, about this caller.
	sandboxdv1.WorkloadService_UpdateWorkload_FullMethodName: {verb: access.Update, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_PauseWorkload_FullMethodName:  {verb: access.Control, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_ResumeWorkload_FullMethodName: {verb: access.Control, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_WaitWorkload_FullMethodName:   {verb: access.View, on: onWorkload, long: true},
	sandboxdv1.WorkloadService_DeleteWorkload_FullMethodName: {verb: access.Delete, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_Exec_FullMethodName:           {verb: access.Exec, on: onWorkload, audited: true, long: true},
	sandboxdv1.WorkloadService_Attach_FullMethodName:         {verb: access.Exec, on: onWorkload, audited: true, long: true},
	sandboxdv1.WorkloadService_StreamLogs_FullMethodName:     {verb: access.Logs, on: onWorkload, long: true},
	sandboxdv1.WorkloadService_CopyIn_FullMethodName:         {verb: access.Copy, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_CopyOut_FullMethodName:        {verb: access.Copy, on: onWorkload, audited: true},
	sandboxdv1.WorkloadService_GetUsage_FullMethodName:       {verb: access.View, on: onWorkload},
	sandboxdv1.WorkloadService_ListUsage_FullMethodName:      {verb: access.View, on: onVisible},
	sandboxdv1.WorkloadService_WatchEvents_FullMethodName:    {verb: access.View, on: onVisible, long: true},
	sandboxdv1.WorkloadService_GetOCIConfig_FullMethodName:   {verb: access.View, on: onWorkload},

	sandboxdv1.ImageService_ImportImage_FullMethodName: {verb: access.ImagesAdd, on: onRequest, audited: true},
	// A pull is given up when the daemon stops: it may take minutes and leaves nothing half done.
	sandboxdv1.ImageService_PullImage_FullMethodName:   {verb: access.ImagesAdd, on: onRequest, audited: true, long: true},
	sandboxdv1.ImageService_ListImages_FullMethodName:  {verb: access.ImagesView, on: onVisible},
	sandboxdv1.ImageService_GetImage_FullMethodName:    {verb: access.ImagesView, on: onRequest},
	sandboxdv1.ImageService_RemoveImage_FullMethodName: {verb: access.ImagesRemove, on: onRequest, audited: true},

	// Whoever may not create something has no business with what would be decided.
	sandboxdv1.PolicyService_Explain_FullMethodName:   {verb: access.Create, on: onRequest},
	sandboxdv1.PolicyService_GetPolicy_FullMethodName: {verb: access.PolicyView},

	sandboxdv1.TemplateService_ListTemplates_FullMethodName: {verb: access.TemplatesView},
	// Given up when the daemon stops: it leaves nothing half done.
	sandboxdv1.TemplateService_BuildTemplate_FullMethodName:  {verb: access.TemplatesBuild, on: onRequest, audited: true, long: true},
	sandboxdv1.TemplateService_RemoveTemplate_FullMethodName: {verb: access.TemplatesRemove, audited: true},

	sandboxdv1.SnapshotService_CreateSnapshot_FullMethodName: {verb: access.Snapshot, on: onWorkload, audited: true},
	sandboxdv1.SnapshotService_ListSnapshots_FullMethodName:  {verb: access.Snapshot, on: onVisible},
	sandboxdv1.SnapshotService_DeleteSnapshot_FullMethodName: {verb: access.Snapshot, on: onSnapshot, audited: true},
	// What comes of it is created, with labels and a spec that the same role must allow: the handlers see to it.
	sandboxdv1.SnapshotService_RestoreSnapshot_FullMethodName: {verb: access.Snapshot, also: []access.Verb{access.Create, access.Control, access.View}, on: onSnapshot, audited: true},
	sandboxdv1.SnapshotService_ForkWorkload_FullMethodName:    {verb: access.Snapshot, also: []access.Verb{access.Create, access.Control, access.View}, on: onWorkload, audited: true},

	sandboxdv1.SystemService_Info_FullMethodName:   {verb: access.SystemView},
	sandboxdv1.SystemService_Doctor_FullMethodName: {verb: access.SystemView},

	// What the API looks like and whether it is up is no secret to those who can connect.
	healthpb.Health_Check_FullMethodName:                                   {open: true},
	healthpb.Health_List_FullMethodName:                                    {open: true},
	healthpb.Health_Watch_FullMethodName:                                   {open: true, long: true},
	reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName:      {open: true, long: true},
	reflectionalphapb.ServerReflection_ServerReflectionInfo_FullMethodName: {open: true, long: true},
}
