"""The networks of suite `fold`: the smallest with batch norm of each of timm's families, found by their names."""

from __future__ import annotations

__all__ = ["NAMED", "OTHERS", "SIDES"]

# The families for which a target is set.
NAMED = """
resnet50 efficientnet_b0 mobilenetv3_large_100 mobilevit_xxs levit_128s densenet121 regnetx_002 regnety_002
hrnet_w18_small inception_v3 dla34 ghostnet_100 rexnet_100 darknet17 repvgg_a0 legacy_xception
""".split()

# By their number of parameters.
OTHERS = """
starnet_s050 dla46x_c mobilevitv2_050 mobilenetv3_small_050 lcnet_035 mobilenetv2_035 ese_vovnet19b_slim_dw
mnasnet_small tf_mobilenetv3_small_075 tinynet_e semnasnet_050 repghostnet_050 efficientvit_m0 ghostnet_050
cspnext_tiny xcit_nano_12_p8_224 cs3darknet_focus_s ghostnetv3_050 efficientvit_b0 swiftformer_xs
efficientformerv2_s0 fasternet_t0 mobilenet_edgetpu_100 lcnetv2_small mixnet_s inception_next_atto
spnasnet_100 mobileone_s1 rexnetr_100 hardcorenas_b tf_efficientnet_b0 resnet10t repvit_m1 fbnetc_100
hgnetv2_b0 shvit_s1 cpubone_nano iformer_s efficientvim_m1 regnetz_005 maxvit_pico_rw_256 densenetblur121d
halonet_h1 gernet_s fbnetv3_b dpn48b regnetz_b16 resnext26ts eca_resnext26ts visformer_tiny seresnext26ts
gcresnext26ts eca_botnext26ts_256 resnest14d bat_resnext26ts lambda_resnet26t fastvit_mci0 haloregnetz_b
resnetv2_18 resnetblur18 legacy_seresnet18 seresnet18 skresnet18 tiny_vit_5m_224 efficientformer_l1
botnet26t_256 gc_efficientnetv2_rw_t sehalonet33ts sebotnet33ts_256 coatnet_nano_cc_224 lowformer_b0
hgnet_tiny ecaresnext26t_32x4d ecaresnet26t seresnext26t_32x4d resnet32ts seresnet33ts gcresnet33ts
cspresnext50 regnetv_040 sedarknet21 convmixer_768_32 efficientnetv2_s cspresnet50 resnetaa34d
lamhalobotnet50ts_256 vovnet39a eca_vovnet39b halo2botnet50ts_256 resnext50_32x4d res2net50_14w_8s volo_d1_224
xception41p skresnext50_32x4d cspdarknet53 seresnetaa50d ecaresnetlight selecsls42 tresnet_m nextvit_small
resnetrs50 darknetaa53 inception_v4 inception_resnet_v2 vit_small_resnet50d_s16_224 wide_resnet50_2
pnasnet5large nasnetalarge seresnextaa101d_32x8d senet154 vgg11_bn
""".split()

# These take no other size than their own, or fall to nothing below it.
AT_224 = """
coatnet_nano_cc_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0 haloregnetz_b levit_128s
swiftformer_xs visformer_tiny vit_small_resnet50d_s16_224 volo_d1_224 xcit_nano_12_p8_224
""".split()
AT_256 = """
bat_resnext26ts botnet26t_256 eca_botnext26ts_256 halo2botnet50ts_256 halonet_h1 lamhalobotnet50ts_256
maxvit_pico_rw_256 sebotnet33ts_256 sehalonet33ts
""".split()

SIDES = {
    **dict.fromkeys((*NAMED, *OTHERS), 96),  # pixels
    **dict.fromkeys(AT_224, 224),
    **dict.fromkeys(AT_256, 256),
}
