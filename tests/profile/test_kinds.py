"""What kind of work a name stands for: names as the profiler gives them."""

import pytest

from ccmim_fast.profile.kinds import KINDS, kind_of_kernel, kind_of_op

NATIVE = "void at::native::"
ADAM = (
    "(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>, float>"
)

GPU_KERNELS = {
    "matmul": [
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "ampere_sgemm_128x64_nn",
        "maxwell_sgemm_128x128_tn",
        "volta_fp16_s884gemm_fp16_128x128_ldg8_f2f_nn",
        "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize96x64x32_stage4_warpsize2x2x1_tensor16x8x16_kernel",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNN",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(Params)",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_32x32_128x2_nn_align8>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false, false>(Params)",
        "void splitKreduce_kernel<32, 16, int, float, float, float, true>(cublasSplitKParams<float>)",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, true>(Params)",
        "void gemmSN_NN_kernel<float, 128, 2, 4, 8, 5, 4, false, cublasGemvTensorStridedBatched<float const> >(Params)",
        "triton_tem_fused_addmm_gelu_12",
        "triton_mm",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32",
        "void cudnn::cnn::implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, true>(int, int)",
    ],
    "attention": [
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>>(Params)",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>(Params)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel>()",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, pytorch_flash::Flash_bwd_kernel_traits<64>>(Params)",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloop<2>>>>()",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "fmha_cutlassB_f32_aligned_64x64_k64_sm50(PyTorchMemEffAttention::AttentionBackwardKernel<float>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm80_flash_bprop_f16_knob_31_128x64x64_8x1x1_kernel0_0",
        "triton_tem_fused_flex_attention_0",
    ],
    "elementwise": [
        NATIVE + "vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >(int)",
        NATIVE
        + "vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)::{lambda()#1}>",
        NATIVE + "unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>(int)",
        NATIVE + "(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float)",
        NATIVE + "(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float, float>(float const*)",
        NATIVE + "(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u, 8u, 64u>(long)",
        NATIVE + "reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>(ReduceOp)",
        NATIVE + "(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::OpaqueType<4>, unsigned>()",
        NATIVE + "_scatter_gather_elementwise_kernel<128, 4, at::native::_cuda_scatter_gather_internal_kernel<true>>",
        NATIVE + "batch_norm_collect_statistics_channels_last_kernel<at::native::Var, float, float, 4>(float const*)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>(float*, float const*)",
        "triton_poi_fused_addmm_gelu_5",
        "triton_poi_fused__scaled_dot_product_flash_attention_clone_3",
        "triton_red_fused_native_layer_norm_mm_7",
        "triton_per_fused_add_native_layer_norm_2",
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
    ],
    "optimizer": [
        NATIVE + ADAM,
        "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, float, int>, float, float>(long)",
        "triton_for_fused_0",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllGather_RING_LL_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)",
    ],
    "our kernels": ["ccmim_divide_tokens_kernel", "ccmim_gradient_kernel", "ccmim_masked_patch_loss_kernel_0d1d2d3de"],
    "other": [
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::Policy900>(bool, int)",
        NATIVE + "bitonicSortKVInPlace<2, -1, 16, 16, float, long>(Info)",
        "a_kernel_nobody_knows",
    ],
}

OPERATORS = {
    "matmul": ["aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::_addmm_activation", "aten::addmv_"],
    "attention": [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_backward",
    ],
    "elementwise": [
        "aten::add_",
        "aten::gelu_backward",
        "aten::native_layer_norm",
        "aten::native_batch_norm_backward",
        "aten::copy_",
        "aten::_to_copy",
        "aten::_softmax",
        "aten::sum",
        "aten::cat",
        "aten::gather",
        "aten::scatter_add_",
        "aten::where",
        "aten::bitwise_xor",
    ],
    "optimizer": [
        "aten::_fused_adamw_",
        "aten::_foreach_lerp_",
        "Optimizer.step#AdamW.step",
        "Optimizer.zero_grad#AdamW.zero_grad",
        "aten::_amp_foreach_non_finite_check_and_unscale_",
    ],
    "communication": [
        "c10d::allreduce_",
        "gloo:all_reduce",
        "nccl:all_gather",
        "record_param_comms",
        "_AllReduceBackward",
        "_Send",
        "_ArriveBackward",
        "torch::distributed::reducer::mul_out",
        "torch.distributed.ddp.reducer::copy_bucket_to_grad",
    ],
    "our kernels": ["ccmim::divide_tokens", "ccmim::info_nce_gradient"],
    "other": [
        "aten::view",
        "aten::t",
        "aten::as_strided",
        "aten::_unsafe_view",
        "aten::resize_",
        "aten::empty_strided",
        "aten::argsort",
        "AddmmBackward0",
        "ScaledDotProductFlashAttentionForCpuBackward0",
        "autograd::engine::evaluate_function: MmBackward0",
        "torch::autograd::AccumulateGrad",
        "DistributedDataParallel.forward",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in GPU_KERNELS.items() for name in names])
def test_kernels(kind, name):
    assert kind in KINDS
    assert kind_of_kernel(name) == kind


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in OPERATORS.items() for name in names])
def test_operators(kind, name):
    assert kind in KINDS
    assert kind_of_op(name) == kind
