// C ABI of the cluster kernel, called by kernels/cluster.py through ctypes.  Functions return a cudaError.
#pragma once

static cudaLaunchConfig_t launch_config(cudaLaunchAttribute* attribute, int cluster, int clusters, int shared_bytes, void* stream) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = cluster;
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster * clusters);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attribute;
    config.numAttrs = 1;
    return config;
}

// Allow this much shared memory and this cluster on `device`; *clusters: how many run there at the same time
extern "C" int cluster_loss_prepare(int device, int cluster, int shared_bytes, int* clusters) {
    cudaError_t error = cudaSetDevice(device);  // this library has a CUDA runtime of its own
    if (!error) error = cudaFuncSetAttribute(cluster_loss_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (!error) error = cudaFuncSetAttribute(cluster_loss_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, cluster > 8);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_config(&attribute, cluster, 1, shared_bytes, nullptr);
    if (!error) error = cudaOccupancyMaxActiveClusters(clusters, cluster_loss_kernel, &config);
    return error;
}

extern "C" int cluster_loss_launch(const Job* job, int device, int cluster, int clusters, int shared_bytes, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_config(&attribute, cluster, clusters, shared_bytes, stream);
    if (!error) error = cudaLaunchKernelEx(&config, cluster_loss_kernel, *job);
    return error;
}

extern "C" const char* cluster_loss_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
