package server

import (
	"context"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// who may call a method. The zero value is nobody, so a row that forgets to say refuses.
type who int

const (
	nobody who = iota
	// connected: whoever could open the socket, which its mode 0660 limits to root and the socket's group, provided the
	// kernel said who it is.
	connected
)

// access is a row of the table below.
type access struct {
	who who
	// The call lasts as long as its caller likes, so a daemon that stops ends it at once instead of waiting for it.
	long bool
}

// methods says who may call what. A method that is not in it may be called by nobody; a test compares it with what is
// registered.
var methods = map[string]access{
	// Whoever may create a workload may do everything with every workload: there are no owners yet.
	sandboxdv1.WorkloadService_CreateWorkload_FullMethodName: {who: connected},
	sandboxdv1.WorkloadService_StartWorkload_FullMethodName:  {who: connected},
	sandboxdv1.WorkloadService_GetWorkload_FullMethodName:    {who: connected},
	sandboxdv1.WorkloadService_ListWorkloads_FullMethodName:  {who: connected},
	sandboxdv1.WorkloadService_StopWorkload_FullMethodName:   {who: connected},
	sandboxdv1.WorkloadService_KillWorkload_FullMethodName:   {who: connected},
	// An update is no way round the policy: that is asked again, about this caller.
	sandboxdv1.WorkloadService_UpdateWorkload_FullMethodName: {who: connected},
	sandboxdv1.WorkloadService_PauseWorkload_FullMethodName:  {who: connected},
	sandboxdv1.WorkloadService_ResumeWorkload_FullMethodName: {who: connected},
	sandboxdv1.WorkloadService_WaitWorkload_FullMethodName:   {who: connected, long: true},
	sandboxdv1.WorkloadService_DeleteWorkload_FullMethodName: {who: connected},
	sandboxdv1.WorkloadService_Exec_FullMethodName:           {who: connected, long: true},
	sandboxdv1.WorkloadService_Attach_FullMethodName:         {who: connected, long: true},
	sandboxdv1.WorkloadService_StreamLogs_FullMethodName:     {who: connected, long: true},
	sandboxdv1.WorkloadService_CopyIn_FullMethodName:         {who: connected},
	sandboxdv1.WorkloadService_CopyOut_FullMethodName:        {who: connected},
	sandboxdv1.WorkloadService_GetUsage_FullMethodName:       {who: connected},
	sandboxdv1.WorkloadService_WatchEvents_FullMethodName:    {who: connected, long: true},
	sandboxdv1.WorkloadService_GetOCIConfig_FullMethodName:   {who: connected},

	sandboxdv1.ImageService_ImportImage_FullMethodName: {who: connected},
	// A pull is given up when the daemon stops: it may take minutes and leaves nothing half done.
	sandboxdv1.ImageService_PullImage_FullMethodName:   {who: connected, long: true},
	sandboxdv1.ImageService_ListImages_FullMethodName:  {who: connected},
	sandboxdv1.ImageService_GetImage_FullMethodName:    {who: connected},
	sandboxdv1.ImageService_RemoveImage_FullMethodName: {who: connected},

	sandboxdv1.PolicyService_Explain_FullMethodName:   {who: connected},
	sandboxdv1.PolicyService_GetPolicy_FullMethodName: {who: connected},

	sandboxdv1.SystemService_Info_FullMethodName:   {who: connected},
	sandboxdv1.SystemService_Doctor_FullMethodName: {who: connected},

	// What the API looks like and whether it is up is no secret to those who may use it.
	healthpb.Health_Check_FullMethodName:                                   {who: connected},
	healthpb.Health_List_FullMethodName:                                    {who: connected},
	healthpb.Health_Watch_FullMethodName:                                   {who: connected, long: true},
	reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName:      {who: connected, long: true},
	reflectionalphapb.ServerReflection_ServerReflectionInfo_FullMethodName: {who: connected, long: true},
}

// authorize refuses the call of ctx unless the table allows it.
func authorize(ctx context.Context, method string) error {
	_, identified := callerOf(ctx)
	if methods[method].who == connected && identified {
		return nil
	}
	return spec.Errorf(spec.KindDenied, "this caller may not call %s", method).WithReason(reasonForbidden)
}
